"""Find-Embedding with Gradient-Guided Soft Masking (arXiv 2602.10622), as a small library.

Read the paper in seven files, in this order: ``template`` (Eq. 9-10), ``masks`` (Eq. 4),
``guidance`` (Eq. 5, 15), ``recipes`` (A.4), ``loss`` (Eq. 6-8), ``model`` (Eq. 11-14), ``evaluation``.
"""

import warnings

# A page holds no stderr, and tqdm, which transformers imports, says there that it can't draw widgets.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
