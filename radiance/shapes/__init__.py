"""The synthetic dataset `shapes`: scenes, their images and captions, and scores of images."""
