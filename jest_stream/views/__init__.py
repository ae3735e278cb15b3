"""Makes tensors of examples: the score view of every candidate, the train view of the chosen.

`ScoreView` turns one example into a row, `collate` stacks rows into columns; both run where the
examples are read, in worker processes if there are any. `TrainView` makes the random view of the
few that were chosen, `LateViews` has it made ahead of time, and `scaled` makes a smaller one of the
score view. The metadata that selection needs travel along as `term` and `group`.
"""

from jest_stream.views.columns import (
    REFERENCE,
    Columns,
    collate,
    columns_of,
    put_view,
    require_same_fields,
    tensors_of,
    view_of,
)
from jest_stream.views.compose import PixelTable
from jest_stream.views.late import LateViews
from jest_stream.views.recipe import Recipe, make_recipe
from jest_stream.views.rows import Row, add_view
from jest_stream.views.scaling import scaled
from jest_stream.views.score import ScoreView
from jest_stream.views.train import TrainView

__all__ = [
    "Columns",
    "LateViews",
    "PixelTable",
    "REFERENCE",
    "Recipe",
    "Row",
    "ScoreView",
    "TrainView",
    "add_view",
    "collate",
    "columns_of",
    "make_recipe",
    "put_view",
    "require_same_fields",
    "scaled",
    "tensors_of",
    "view_of",
]
