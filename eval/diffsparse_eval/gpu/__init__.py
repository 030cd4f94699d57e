"""What a GPU makes of our kernels, in one command of some minutes: `python -m diffsparse_eval.gpu`, `make gpu`.

It wants torch, Triton and `diffsparse_kernels`; stages that run whole models use Diffusers where it is there.
"""
