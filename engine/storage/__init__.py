"""Read files from disks, archives, web servers and object stores; write results folders and lock them."""
