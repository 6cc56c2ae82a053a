"""Find out which layers of PyTorch models represent the data alike: centered kernel alignment by forward hooks.

compare            a model (or several), a loader -> CKAResult
CKAResult          the matrix with its standard errors; save, load, plot
Comparison         the same for your own loop: update(batch), compute()
Precomputed        features that somebody else computed, to be compared with a model's
LayerRecorder      hooks on named modules, for people who write their own loop
CKAAccumulator     minibatch CKA, one forward pass at a time
cka, cka_matrix    CKA of tensors in hand
cka_loss           1 - CKA, with gradients
"""

import logging

from cka_hooks import errors
from cka_hooks.compare import compare
from cka_hooks.errors import *  # noqa: F403
from cka_hooks.recording.recorder import LayerRecorder
from cka_hooks.results.result import CKAResult, Influence
from cka_hooks.results.uncertainty import Difference
from cka_hooks.run.comparison import Comparison
from cka_hooks.run.precomputed import Precomputed
from cka_hooks.similarity.accumulator import CKAAccumulator
from cka_hooks.similarity.tensors import cka, cka_loss, cka_matrix

__version__ = "0.1.0"

# Silent unless you ask for it: logging.getLogger("cka_hooks").setLevel(logging.INFO) and a handler.
logging.getLogger("cka_hooks").addHandler(logging.NullHandler())

__all__ = [
    "CKAAccumulator",
    "CKAResult",
    "Comparison",
    "Difference",
    "Influence",
    "LayerRecorder",
    "Precomputed",
    "cka",
    "cka_loss",
    "cka_matrix",
    "compare",
]
__all__ += errors.__all__
