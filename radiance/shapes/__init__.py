"""The synthetic data set `shapes`: scenes, their images and captions, and scores of images."""
