"""`tessera verify`: every layout computes what one process computes, shown on the user's model."""
