"""Documents -> tokens -> lanes -> blocks. Imports nothing: a plan looks at files of token ids without torch."""
