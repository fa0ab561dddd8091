"""From a checkpoint to a folder that anybody's transformers opens: written, reloaded, compared."""
