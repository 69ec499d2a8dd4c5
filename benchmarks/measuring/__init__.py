"""What every benchmark shares: a cell of a sweep, its costs and scores, and the rows that are made of cells."""
