"""GPT-2, its loss and kernels, its optimizer, its files."""
