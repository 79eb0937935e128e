"""Event types, their codec, the spool file between training and supervisor, and the live wire."""
