package server

import "net/http"

func (s *Server) registerMessages(mux *http.ServeMux) {}
