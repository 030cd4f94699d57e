from .backend.emulated import incoherence as incoherence, quantise as quantise
from .case import PRECISIONS as PRECISIONS, Summary as Summary
from .errors import (
    BackendError as BackendError,
    DiffsparseError as DiffsparseError,
    KernelInputError as KernelInputError,
    NoKernelError as NoKernelError,
)
from .functional import (
    attention as attention,
    attention_of_few as attention_of_few,
    attention_with_mass as attention_with_mass,
    best_block as best_block,
    block_mass as block_mass,
    block_sparse_attention as block_sparse_attention,
    break_even as break_even,
    default_block as default_block,
    fit_rows as fit_rows,
    kernel_for as kernel_for,
    lists_of_bits as lists_of_bits,
    lists_of_largest as lists_of_largest,
    lists_of_rows as lists_of_rows,
    move_rows as move_rows,
    quantised_attention as quantised_attention,
    restore_rows as restore_rows,
    summarise as summarise,
    summary_error as summary_error,
)
from .lists import Block as Block, BlockLists as BlockLists, edges as edges, written as written
from .masks import Boxes as Boxes
from .merge import merge_attention as merge_attention
from .registry import (
    Choice as Choice,
    backend_for as backend_for,
    backends as backends,
    forget_measurements as forget_measurements,
    record as record,
)
from .rows import Correction as Correction
from .select import select_heads as select_heads, select_mass as select_mass, select_rows as select_rows
from .summaries import (
    Summaries as Summaries,
    block_means as block_means,
    spread as spread,
)
