"""Checks and times of our kernels on a GPU, in one command: `python -m diffsparse_eval.gpu`, `make gpu`.

It needs torch, Triton and `diffsparse_kernels`; stages that run whole models use Diffusers if it is installed.
"""
