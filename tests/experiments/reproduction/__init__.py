"""The reproductions of the paper's tables, run small."""
