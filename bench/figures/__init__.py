"""The figures and tables that the documents show, each from a record in `bench/results`.

A function takes the records and returns Markdown; its name is what stands around it there:
`<!-- figure: NAME -->...<!-- end -->`.
"""

from bench.figures import activations, gpu, layers, layouts, memory, sampled, steps, training
from bench.figures.common import FIGURES, NOT_MEASURED, RESULTS, Records

__all__ = [
    "FIGURES",
    "NOT_MEASURED",
    "RESULTS",
    "Records",
    "activations",
    "gpu",
    "layers",
    "layouts",
    "memory",
    "sampled",
    "steps",
    "training",
]
