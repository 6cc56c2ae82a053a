"""CKA while a network trains, for Lightning, for Hugging Face's Trainer, and for a training loop of your own."""

from cka_hooks.integrations.training import TrainingCKA

__all__ = ["TrainingCKA"]
