"""The method: rectified flow, its training objective and its sampling."""
