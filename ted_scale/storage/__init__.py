"""Remote bytes: objects under s3:// and msc://, their chunks on local disk, models on the hub."""
