"""What tuning costs, beside full fine-tuning and other libraries."""
