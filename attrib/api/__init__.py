"""Three lines of Python over the objects of the runner, with the same numbers: explain, evaluate, compare.

``nets`` and ``parts`` make objects of what people say, ``inputs`` a dataset of what they hand over; ``computing`` does
with them what a run does, without a work directory.
"""

from attrib.api.comparison import Comparison
from attrib.api.explanation import Explanation
from attrib.api.front import compare, evaluate, explain
from attrib.api.parts import dataset

__all__ = ["Comparison", "Explanation", "compare", "dataset", "evaluate", "explain"]
