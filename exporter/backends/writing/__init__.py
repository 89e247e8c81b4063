"""Writers that backends share."""
