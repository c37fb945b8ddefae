"""Images in: folders and datasets, decoding, augmentation, streaming. Imports nothing else of the package."""
