package server

import "net/http"

func (s *Server) registerChat(mux *http.ServeMux) {}
