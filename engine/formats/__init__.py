"""Parse the headers of encoded images, one module per format; decode nothing."""
