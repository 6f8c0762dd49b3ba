"""Kernels that are written in `pallas_kernels.hopper.ptx` words, run on NumPy.

registers.py has the vocabulary: registers of all threads as arrays, and what needs neither memory nor other threads.
threads.py has the threads that take every step together and the memory they reach, which both emulators share:
lockstep.py runs the threads of a block step by step together, warpgroups.py lets a block's warpgroups take turns.
"""
