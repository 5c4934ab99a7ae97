"""Query-answer pairs written by a language model and checked against the records (paper 3.2)."""
