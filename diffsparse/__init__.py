"""Training-free sparse attention for diffusion transformers: one line on, one line off.

>>> import diffsparse
>>> from diffsparse import AdaSpa
>>> with diffsparse.apply(pipe, AdaSpa(sparsity=0.8)) as sparse:  # doctest: +SKIP
...     video = pipe(prompt).frames[0]
>>> print(sparse.report())  # doctest: +SKIP
"""

import lazy_loader

__version__ = "0.1.0"

# `__init__.pyi` lists the public names. Each is imported on first use: `diffsparse --help` never waits for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
