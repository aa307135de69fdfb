"""What people look at, drawn from result files alone: figures, pages that open from disk, exports."""
