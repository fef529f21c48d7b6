"""Documents -> tokens -> lanes -> blocks."""
