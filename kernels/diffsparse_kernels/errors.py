"""The root of the project's exception tree, and the errors that kernels raise."""


class DiffsparseError(Exception):
    """Root of every error that diffsparse raises on purpose: wanted, got, remedy in one sentence or two."""


class KernelInputError(DiffsparseError, ValueError):
    """Tensors or block lists that a kernel can't take: wrong shape, dtype, device or length."""


class NoKernelError(KernelInputError):
    """No kernel of this device can do what is asked: its head size, blocks or number format. Dense attention can."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}. Use dense attention, or backend='reference'")
        self.reason = reason


class BackendError(DiffsparseError, RuntimeError):
    """A backend that was asked for by name is not available here."""
