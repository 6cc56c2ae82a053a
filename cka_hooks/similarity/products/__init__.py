"""Gram matrices of features, one file a backend; `choose` says which one takes which features."""
