"""EXECUTION: apply the edits, stream shard by shard, write the receipt."""
