"""Tables of papers as grids of cells, and what a work directory holds of them."""
