"""Write scored rows to Parquet parts."""
