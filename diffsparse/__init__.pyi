from .errors import (
    BackendError as BackendError,
    ConfigError as ConfigError,
    DenseFallbackError as DenseFallbackError,
    DiffsparseError as DiffsparseError,
    InputFileError as InputFileError,
    KernelInputError as KernelInputError,
    NoKernelError as NoKernelError,
    OutputFileError as OutputFileError,
    PlanError as PlanError,
    UnknownNameError as UnknownNameError,
    UnsupportedModelError as UnsupportedModelError,
)
from .guidance.guide import GuideHandle as GuideHandle, guide as guide
from .guidance.guider import HeadGuidance as HeadGuidance
from .guidance.hunt import HeadHunter as HeadHunter, hunt as hunt
from .guidance.preset import Preset as Preset
from .insight.calibration import calibrate as calibrate
from .insight.inspection import Inspector as Inspector
from .insight.recording import Recorder as Recorder, Recording as Recording
from .orders.layout import Layout as Layout
from .orders.layout import Span as Span
from .schedule import Schedule as Schedule
from .seam.accelerate import accelerate as accelerate
from .seam.patch import Handle as Handle, apply as apply, remove as remove
from .site.compute import Site as Site
from .site.report import Report as Report
from .strategies import (
    GNA as GNA,
    PARO as PARO,
    AdaSpa as AdaSpa,
    Compensated as Compensated,
    Dense as Dense,
    Digest as Digest,
    Random as Random,
    Rounded as Rounded,
    SparseVDiT as SparseVDiT,
    Strategy as Strategy,
    Tangent as Tangent,
)
from .strategies.paro import PAROSearch as PAROSearch
from .strategies.sparse_vdit import SparseVDiTSearch as SparseVDiTSearch

__version__: str
