"""One cell of a table, and its samples on their way to the model."""
