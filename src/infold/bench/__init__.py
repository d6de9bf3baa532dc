"""What a merge buys: base, adapter mode and merged model, timed side by side."""
