package server

import "net/http"

func (s *Server) registerResponses(mux *http.ServeMux) {}
