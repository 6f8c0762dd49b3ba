"""Records what transformers computes for the recorded cases: `python -m tests.support.make_fixtures`.

Needs torch 2.13.0 and transformers 5.23.0, and refuses a case in which some choice is a near-tie.
"""

from tests.support import numpy_reference, oracle, recordings
from tests.support.tiny_models import RECORDED


def main() -> None:
    for name, case in RECORDED.items():
        trace = numpy_reference.forward(case.state, case.fields, case.schedule.is_full, case.tokens, case.lengths)
        if min(trace.index_gap, trace.expert_gap) <= numpy_reference.MIN_GAP:
            raise SystemExit(
                f"{name}: seed {case.seed} has gaps {trace.index_gap:.1e} and {trace.expert_gap:.1e}; take another"
            )
        logits, indices = oracle.record(oracle.build(case), case)
        recordings.write(name, logits, indices)
        print(f"{name}: logits {logits.shape}, indices {indices.shape}")


if __name__ == "__main__":
    main()
