"""The study of self-speculation: which exit drafts, how many tokens, and whether it pays."""
