"""From features to numbers: Gram matrices, their sums over minibatches, CKA. Tensors only, no module and no hook."""
