"""The root of the project's exception tree, and the errors that kernels raise."""


class DiffsparseError(Exception):
    """Root of every error that diffsparse raises on purpose: wanted, got, remedy in one sentence or two."""


class KernelInputError(DiffsparseError, ValueError):
    """Tensors or block lists that a kernel can't take: wrong shape, dtype, device or length."""


class NoKernelError(KernelInputError):
    """No kernel of this device can do what is asked: its head size, blocks or number format. Dense attention can.

    Attributes:
        reason (str): why, in one sentence.
        passed_over (tuple[str, ...]): the back ends that run on this device, each with its own reason.
    """

    def __init__(self, reason: str, passed_over: tuple[str, ...] = ()) -> None:
        super().__init__(f"{reason}. Use dense attention, or backend='reference'")
        self.reason, self.passed_over = reason, passed_over


class BackendError(DiffsparseError, RuntimeError):
    """A backend that was asked for by name is not available here."""
