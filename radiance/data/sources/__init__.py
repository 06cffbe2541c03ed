"""The data sources: each lists the images and captions of one kind of dataset."""
