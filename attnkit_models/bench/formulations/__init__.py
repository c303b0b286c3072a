"""The formulations that attnkit is measured against, each written plainly from its paper's equations."""
