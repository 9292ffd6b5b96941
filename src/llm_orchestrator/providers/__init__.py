"""Language models, embeddings and vector stores behind one small protocol each."""
