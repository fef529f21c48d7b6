"""Documents -> tokens -> lanes -> blocks."""

from recipe.data.blocks import UpdateReader, make_lanes, next_update
from recipe.data.sources import open_source
from recipe.data.tokenizer import load_tokenizer

__all__ = ["UpdateReader", "load_tokenizer", "make_lanes", "next_update", "open_source"]
