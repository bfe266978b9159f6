"""The replay room: who stays in the store, the store itself and its frozen snapshots."""
