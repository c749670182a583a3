"""All that runs found and what they were, as one page."""
