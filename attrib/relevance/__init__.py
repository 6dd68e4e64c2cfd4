"""Layer-wise relevance propagation by graph: one small rule per operation."""
