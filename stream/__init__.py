"""The stream room: the wire contract, the batch source and sink, the join and the worker."""
