"""What travels between processes, and the sockets it travels on; shared by every process."""
