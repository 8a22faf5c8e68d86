"""The tasks: pretraining, fine-tuning, probing and segmentation."""
