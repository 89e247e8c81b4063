"""The walk through the merged model."""
